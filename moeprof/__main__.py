"""Runs the command line: `python -m moeprof`."""

from __future__ import annotations

import sys

from moeprof.cli import main

if __name__ == "__main__":
    sys.exit(main())
