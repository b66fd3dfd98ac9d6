"""Activation, locality and batching as figures and tables of a report."""

from __future__ import annotations

from typing import Any

from moeprof.replay.result import Result
from moeprof.reporting.layout import FigureData, TableData
from moeprof.reporting.vocabulary import (
    Built,
    Rows,
    groups,
    headline_of,
    label_plural,
    listed_items,
    main_places,
    percent,
    place_label,
    records,
)
from moeprof.trace.reader import Trace

_MAX_DETAIL_ROWS = 200
_BATCH_HEADLINE = 8
_FLAT = 0.005
_PAIR_KEYS = {
    "next token": "recorded",
    "same request": "shuffled",
    "any request": "popularity",
    "uniform": "uniform",
}
_MIN_POINTS = 4


def activation_content(trace: Trace, result: Result) -> Built:
    """Returns what a report shows of expert activation."""
    rows = records(result.table)
    figures = [*_heat_figures(trace, result), _idle_figure(trace, rows)]
    figures.append(_label_figure(trace, result))
    headline = []
    for place in main_places(trace):
        headline += [
            f"activation/{quantity}/{place}"
            for quantity in ("inactive_share", "max_over_mean_load", "usage_entropy")
        ]
        headline.append(f"activation/label_distance/{place.split('/')[0]}")
    tables = [
        TableData(
            title="Layers",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["phase", "Phase", "text"],
                ["layer", "Layer", "count"],
                ["inactive_share", "Inactive experts", "share"],
                ["uniform_inactive_share", "uniform routing", "share"],
                ["max_over_mean", "Fullest over mean", "number"],
                ["uniform_max_over_mean", "uniform routing", "number"],
                ["entropy", "Evenness", "ratio"],
                ["uniform_entropy", "uniform routing", "ratio"],
                ["hottest_expert", "Fullest expert", "count"],
                ["hottest_share", "its share of tokens", "share"],
            ],
            rows=rows,
        ),
        TableData(
            title="Experts that hardly work",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["layer", "Layer", "count"],
                ["num_experts", "Experts", "count"],
                ["num_never_used", "Never used", "count"],
                ["num_rarely_used", "Under a tenth of a fair share", "count"],
                ["mean_tokens_per_expert", "Mean tokens per expert", "number"],
            ],
            rows=records(result.tables["dead"]),
        ),
        TableData(
            title=f"Distance between {label_plural(trace)}",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["layer", "Layer", "count"],
                ["distance", "Usage to move", "share"],
                ["chance_distance", "by chance", "share"],
            ],
            rows=[
                row for row in records(result.tables["label_distances"]) if row["site"] is not None
            ],
        ),
    ]
    return headline, figures, tables


def _heat_figures(trace: Trace, result: Result) -> list[FigureData]:
    figures = []
    main = main_places(trace)
    sites = {site.site: site for site in trace.sites}
    by_place = groups(records(result.tables["heat"]), "stack", "phase")
    for (stack, phase), rows in sorted(
        by_place.items(), key=lambda item: f"{item[0][0]}/{item[0][1]}" not in main
    ):
        place = place_label(trace, (stack, phase))
        panels = [
            {
                "title": f"layer {own[0]['layer']}",
                "rows": [
                    f"steps {row['first_step']} to {row['last_step']}"
                    if row["first_step"] != row["last_step"]
                    else f"step {row['first_step']}"
                    for row in own
                ],
                "row_axis": "steps",
                "num_tokens": [row["num_tokens"] for row in own],
                "counts": [row["expert_tokens"] for row in own],
                "num_experts": sites[site].num_experts,
                "top_k": sites[site].top_k,
            }
            for (site,), own in groups(rows, "site").items()
        ]
        figures.append(
            FigureData(
                id=f"heat-{stack}-{phase}",
                kind="heat",
                title=f"Share of tokens per expert over time: {place}",
                alt=(
                    f"Heat maps, one per MoE layer of {place}: consecutive steps from top to "
                    "bottom, experts from left to right, colour is the share of a step's tokens."
                ),
                how_to_read=(
                    "A bright vertical line is an expert that stays busy, a broken one an expert "
                    "whose traffic comes and goes; dark columns are idle weights."
                ),
                figure_class="exact",
                collapsed=f"{stack}/{phase}" not in main,
                panels=panels,
            )
        )
    return figures


def _idle_figure(trace: Trace, rows: Rows) -> FigureData:
    panels = []
    places = main_places(trace)
    for (stack,), own in groups(rows, "stack").items():
        series: Rows = []
        layers = sorted({row["layer"] for row in own})
        for (phase,), found in groups(own, "phase").items():
            by_layer = {row["layer"]: row for row in found}
            columns = {
                name: [by_layer.get(layer, {}).get(name) for layer in layers]
                for name in (
                    "inactive_share", "inactive_share_low", "inactive_share_high",
                    "uniform_inactive_share",
                )
            }  # fmt: skip
            series.append(
                {
                    "key": phase,
                    "label": phase,
                    "values": columns["inactive_share"],
                    "low": columns["inactive_share_low"],
                    "high": columns["inactive_share_high"],
                }
            )
            if f"{stack}/{phase}" in places:
                series.append(
                    {
                        "key": "uniform",
                        "label": f"{phase}, uniform routing",
                        "values": columns["uniform_inactive_share"],
                        "low": None,
                        "high": None,
                    }
                )
        panels.append(
            {
                "title": stack,
                "x_label": "layer",
                "y_label": "inactive experts",
                "y_unit": "share",
                "categories": [str(layer) for layer in layers],
                "series": series,
            }
        )
    alt = listed_items(
        f"{row['stack']} {row['phase']} layer {row['layer']} {percent(row['inactive_share'])}"
        for row in rows
    )
    return FigureData(
        id="inactive",
        kind="layers",
        title="Inactive experts per layer",
        alt=f"Share of experts that no token of a step picked, by layer and phase. {alt}.",
        how_to_read=(
            "Higher is more weights that a step leaves untouched; marks above the hollow ones are "
            "idler than random routing of as many tokens would be. Bars are 90% intervals."
        ),
        figure_class="exact",
        collapsed=False,
        panels=panels,
    )


def _label_figure(trace: Trace, result: Result) -> FigureData:
    sites = {site.site: site for site in trace.sites}
    by_site = groups(records(result.tables["labels"]), "stack", "site")
    labels = label_plural(trace)
    panels = [
        {
            "title": f"layer {own[0]['layer']}"
            if len(trace.info.stacks) == 1
            else f"{stack} layer {own[0]['layer']}",
            "rows": [row["label"] for row in own],
            "row_axis": labels,
            "num_tokens": [row["num_tokens"] for row in own],
            "counts": [row["expert_tokens"] for row in own],
            "num_experts": sites[site].num_experts,
            "top_k": sites[site].top_k,
        }
        for (stack, site), own in by_site.items()
    ]
    return FigureData(
        id="labels",
        kind="heat",
        title=f"Share of tokens per expert by {labels.removesuffix('s')}",
        alt=f"Heat maps, one per MoE layer: {labels} from top to bottom, experts from left to "
        "right, colour is the share of tokens.",
        how_to_read=(
            f"Rows that look alike mean that {labels} share their experts; a column bright in one "
            "row only is a specialist."
        ),
        figure_class="exact",
        collapsed=False,
        panels=panels,
    )


def locality_content(trace: Trace, result: Result) -> Built:
    """Returns what a report shows of temporal locality."""
    reuse = records(result.tables["reuse"])
    windows = records(result.tables["working_set"])
    tokens = records(result.tables["tokens"])
    pairs = records(result.tables["affinity"])
    rows = records(result.table)
    by_place = groups(reuse, "stack", "phase")
    reuse_panels = [
        {
            "title": place_label(trace, place),
            "x_label": "steps since the last use",
            "x_scale": "log2",
            "y_label": "lookups reused within",
            "y_unit": "share",
            "series": [
                _series(own, "distance", "reused_share", "recorded", "as recorded", band=True),
                _series(own, "distance", "shuffled_share", "shuffled", "steps shuffled in time"),
                _series(own, "distance", "uniform_share", "uniform", "uniform routing"),
            ],
        }
        for place, own in ((key, _rising(rows)) for key, rows in by_place.items())
    ]
    window_panels = [
        {
            "title": place_label(trace, place),
            "x_label": "consecutive steps",
            "x_scale": "log2",
            "y_label": "experts of a layer used",
            "y_unit": "share",
            "series": [
                _series(own, "window", "expert_share", "recorded", "as recorded", band=True),
                _series(own, "window", "shuffled_share", "shuffled", "steps shuffled in time"),
            ],
        }
        for place, own in groups(windows, "stack", "phase").items()
        if len(own) > 1
    ]
    first = [row for row in reuse if row["distance"] == 1]
    figures = [
        FigureData(
            id="reuse",
            kind="lines",
            title="Reuse distance",
            alt="Share of expert lookups whose expert was used at most so many steps earlier. "
            + listed_items(
                f"{place_label(trace, (row['stack'], row['phase']))} within one step "
                f"{percent(row['reused_share'])}, shuffled {percent(row['shuffled_share'])}"
                for row in first
            )
            + ".",
            how_to_read=(
                "The gap between recorded and shuffled is what order in time is worth to a cache; "
                "the gap between shuffled and uniform is what popularity is worth."
            ),
            figure_class="exact",
            collapsed=False,
            panels=reuse_panels,
        ),
        FigureData(
            id="working-set",
            kind="lines",
            title="Working set",
            alt="Share of a layer's experts used within a window of consecutive steps.",
            how_to_read=(
                "Read off how large a cache has to be to hold all that the last so many steps "
                "used; a line below the shuffled one means that neighbours in time agree."
            ),
            figure_class="exact",
            collapsed=False,
            panels=window_panels,
        ),
        _overlap_figure(trace, rows),
        _pair_figure(trace, tokens),
        *_affinity_figures(trace, pairs, records(result.tables["prefetch"])),
    ]
    headline = headline_of(
        trace,
        "locality/overlap_share",
        "locality/excess_overlap_share",
        "locality/median_reuse_distance",
        "locality/next_token_share",
        *(("locality/affinity_share", "locality/prefetch_share") if pairs else ()),
    )
    tables = [
        TableData(
            title="Overlap of consecutive steps per layer",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["phase", "Phase", "text"],
                ["layer", "Layer", "count"],
                ["overlap_share", "As recorded", "share"],
                ["shuffled_share", "Shuffled", "share"],
                ["uniform_share", "Uniform", "share"],
                ["excess_share", "Recorded less shuffled", "points"],
            ],
            rows=rows,
        ),
        TableData(
            title="Experts that two tokens share",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["phase", "Phase", "text"],
                ["pair", "Tokens", "text"],
                ["shared_share", "Experts shared", "share"],
            ],
            rows=tokens,
        ),
        TableData(
            title="What a layer says about the next",
            figure_class="exact",
            columns=[
                ["stack", "Stack", "text"],
                ["phase", "Phase", "text"],
                ["layer", "Layer", "count"],
                ["next_layer", "Next", "count"],
                ["token_share", "Told, per token", "share"],
                ["token_popular_share", "by popularity", "share"],
                ["token_shuffled_share", "by another token", "share"],
                ["token_uniform_share", "uniform", "share"],
                ["dispatch_num_fetched", "Fetched per step", "count"],
                ["dispatch_share", "Found", "share"],
                ["dispatch_popular_share", "by popularity", "share"],
                ["dispatch_gain", "Gain", "points"],
                ["information_share", "Information", "share"],
            ],
            rows=pairs[:_MAX_DETAIL_ROWS],
        ),
    ]
    return headline, figures, tables


def _rising(rows: Rows) -> Rows:
    """Returns the part of a curve in which something still happens, and one point more."""
    flat = next(
        (
            index
            for index, row in enumerate(rows)
            if all(
                abs(rows[-1][name] - row[name]) < _FLAT
                for name in ("reused_share", "shuffled_share", "uniform_share")
            )
        ),
        len(rows),
    )
    return rows[: max(flat + 2, _MIN_POINTS)]


def _overlap_figure(trace: Trace, rows: Rows) -> FigureData:
    panels = []
    for (stack, phase), own in groups(rows, "stack", "phase").items():
        panels.append(
            {
                "title": place_label(trace, (stack, phase)),
                "x_label": "layer",
                "y_label": "experts needed again",
                "y_unit": "share",
                "categories": [str(row["layer"]) for row in own],
                "series": [
                    {
                        "key": "recorded",
                        "label": "as recorded",
                        "values": [row["overlap_share"] for row in own],
                        "low": [row["overlap_share_low"] for row in own],
                        "high": [row["overlap_share_high"] for row in own],
                    },
                    {
                        "key": "shuffled",
                        "label": "steps shuffled in time",
                        "values": [row["shuffled_share"] for row in own],
                        "low": None,
                        "high": None,
                    },
                    {
                        "key": "uniform",
                        "label": "uniform routing",
                        "values": [row["uniform_share"] for row in own],
                        "low": None,
                        "high": None,
                    },
                ],
            }
        )
    return FigureData(
        id="overlap",
        kind="layers",
        title="Overlap of consecutive steps per layer",
        alt="Share of the experts of a step that the step before needed too, by layer, beside the "
        "same steps shuffled and uniform routing.",
        how_to_read=(
            "Layers where the solid mark stands well above the shuffled one profit most from "
            "keeping recent experts close."
        ),
        figure_class="exact",
        collapsed=False,
        panels=panels,
    )


def _affinity_figures(trace: Trace, pairs: Rows, curve: Rows) -> list[FigureData]:
    """Returns affinity layer by layer, and what fetching by it finds; none for a single site."""
    if not pairs:
        return []
    yardsticks = (
        ("popular", "popularity", "most popular experts"),
        ("shuffled", "shuffled", "after another token's experts"),
        ("uniform", "uniform", "uniform routing"),
    )
    main = main_places(trace)
    layer_panels, fetch_panels = [], []
    for (stack, phase), own in groups(pairs, "stack", "phase").items():
        layer_panels.append(
            {
                "title": place_label(trace, (stack, phase)),
                "x_label": "layer whose experts are told, from the one before",
                "y_label": "experts of a token told",
                "y_unit": "share",
                "categories": [str(row["next_layer"]) for row in own],
                "series": [
                    {
                        "key": "recorded",
                        "label": "after the token's own experts",
                        "values": [row["token_share"] for row in own],
                        "low": [row["token_share_low"] for row in own],
                        "high": [row["token_share_high"] for row in own],
                    },
                    *(
                        {
                            "key": key,
                            "label": label,
                            "values": [row[f"token_{name}_share"] for row in own],
                            "low": None,
                            "high": None,
                        }
                        for name, key, label in yardsticks
                    ),
                ],
            }
        )
    for (stack, phase), own in groups(curve, "stack", "phase").items():
        if f"{stack}/{phase}" not in main:
            continue
        x = "dispatch_num_fetched"
        fetch_panels.append(
            {
                "title": place_label(trace, (stack, phase)),
                "x_label": "experts fetched per layer and step",
                "x_scale": "log2",
                "y_label": "experts of a step fetched",
                "y_unit": "share",
                "series": [
                    _series(
                        own, x, "dispatch_share", "recorded", "after the step's experts", band=True
                    ),
                    *(
                        _series(own, x, f"dispatch_{name}_share", key, label)
                        for name, key, label in yardsticks
                        if name != "shuffled"
                    ),
                ],
            }
        )
    told = listed_items(
        f"{place_label(trace, (row['stack'], row['phase']))} layer {row['next_layer']} "
        f"{percent(row['token_share'])}, by popularity {percent(row['token_popular_share'])}"
        for row in pairs
        if f"{row['stack']}/{row['phase']}" in main
    )
    return [
        FigureData(
            id="affinity",
            kind="layers",
            title="What a layer says about the next",
            alt="Share of a token's experts found among as many that are most likely after its "
            f"experts at the layer before, by layer, beside popularity and controls: {told}.",
            how_to_read=(
                "Solid marks far above the popular ones: the experts of a layer tell those of the "
                "next, which prefetching and placement can use. Marks of another token's experts "
                "at the height of the popular ones: it is the token that links them, not the step."
            ),
            figure_class="exact",
            collapsed=False,
            panels=layer_panels,
        ),
        FigureData(
            id="prefetch",
            kind="lines",
            title="Fetching a layer ahead",
            alt="Share of the experts of a step found among those fetched by the experts of the "
            "layer before, against how many are fetched, beside popularity and uniform routing.",
            how_to_read=(
                "Read off what fetching so many experts before the next layer runs would find; the "
                "gap to the popular ones is what a table of next experts is worth."
            ),
            figure_class="exact",
            collapsed=False,
            panels=fetch_panels,
        ),
    ]


def _pair_figure(trace: Trace, rows: Rows) -> FigureData:
    names = {
        "next token": "neighbours in one sequence",
        "same request": "two tokens of one request",
        "any request": "two tokens of any request",
        "uniform": "uniform routing",
    }
    bars = [
        {
            "label": f"{place_label(trace, (stack, phase))}: {names[row['pair']]}",
            "value": row["shared_share"],
            "low": row["shared_share_low"],
            "high": row["shared_share_high"],
            "unit": "share",
            "key": _PAIR_KEYS[row["pair"]],
        }
        for (stack, phase), own in groups(rows, "stack", "phase").items()
        # A translation's decoder prompt is a start and a language token: no neighbourhood.
        if phase != "prefill" or "encoder" not in trace.info.stacks
        for row in own
    ]
    return FigureData(
        id="pairs",
        kind="meters",
        title="Experts that two tokens share",
        alt="Bars: "
        + listed_items(f"{bar['label']} {percent(bar['value'])}" for bar in bars)
        + ".",
        how_to_read=(
            "From bottom to top: chance, popular experts, the topic of a request, and the "
            "neighbourhood within it. The step between two bars is what each adds."
        ),
        figure_class="exact",
        collapsed=False,
        panels=[{"rows": bars}] if bars else [],
    )


def _series(
    rows: Rows, x: str, y: str, key: str, label: str, *, band: bool = False
) -> dict[str, Any]:
    return {
        "key": key,
        "label": label,
        "points": [
            [row[x], row[y], row[f"{y}_low"] if band else None, row[f"{y}_high"] if band else None]
            for row in rows
            if row[y] is not None
        ],
    }


def batching_content(trace: Trace, result: Result) -> Built:
    """Returns what a report shows of distinct experts against batch size."""
    curve = records(result.tables["curve"])
    recorded = groups(records(result.tables["dispatches"]), "stack", "phase")
    panels = []
    headline = []
    for (stack, phase), rows in groups(curve, "stack", "phase").items():
        series = [
            _series(rows, "num_tokens", "distinct_share", "recorded", "this trace", band=True),
            _series(
                rows,
                "num_tokens",
                "popularity_share",
                "popularity",
                "independent tokens, same popularity",
            ),
            _series(rows, "num_tokens", "uniform_share", "uniform", "uniform routing"),
        ]
        run = recorded.get((stack, phase), [])
        if run:
            dots = _series(run, "mean_num_tokens", "distinct_share", "run", "steps as they ran")
            series.append({**dots, "marks": True})
        panels.append(
            {
                "title": place_label(trace, (stack, phase)),
                "x_label": "tokens in the batch",
                "x_scale": "log2",
                "y_label": "experts of a layer needed",
                "y_unit": "share",
                "series": series,
            }
        )
        if f"{stack}/{phase}" in main_places(trace):
            sizes = sorted({min(_BATCH_HEADLINE, rows[-1]["num_tokens"]), rows[-1]["num_tokens"]})
            headline += [f"batching/distinct_share/{stack}/{phase}/{size}" for size in sizes]
    figure_class = result.metrics[0].figure_class if result.metrics else "exact"
    figure = FigureData(
        id="distinct",
        kind="lines",
        title="Distinct experts against batch size",
        alt="Share of a layer's experts that a batch of tokens needs, against the batch size. "
        + listed_items(
            f"{place_label(trace, (row['stack'], row['phase']))} {row['num_tokens']} tokens "
            f"{percent(row['distinct_share'])}"
            for row in curve
        )
        + ".",
        how_to_read=(
            "The lower the line, the fewer weights a batch has to read or fetch. Below the "
            "popularity line tokens of a batch agree; the uniform line is E(1-(1-k/E)^T)."
        ),
        figure_class=figure_class,
        collapsed=False,
        panels=panels,
    )
    table = TableData(
        title="Batch sizes",
        figure_class=figure_class,
        columns=[
            ["stack", "Stack", "text"],
            ["phase", "Phase", "text"],
            ["num_tokens", "Tokens", "count"],
            ["distinct_share", "Experts needed", "share"],
            ["popularity_share", "Same popularity", "share"],
            ["uniform_share", "Uniform routing", "share"],
        ],
        rows=curve,
    )
    per_layer = TableData(
        title="Batch sizes by layer",
        figure_class=figure_class,
        columns=[
            ["stack", "Stack", "text"],
            ["phase", "Phase", "text"],
            ["layer", "Layer", "count"],
            ["num_tokens", "Tokens", "count"],
            ["distinct_share", "Experts needed", "share"],
            ["num_distinct", "Experts", "number"],
            ["uniform_share", "Uniform routing", "share"],
        ],
        rows=records(result.table)[:_MAX_DETAIL_ROWS],
    )
    return headline, [figure], [table, per_layer]
