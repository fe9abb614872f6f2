"""`lambda-maml` and, for torchrun, `python -m lambda_maml`."""

from __future__ import annotations

import sys

from .extras import wanted


def main() -> None:
    """Entry point of the console script."""
    try:
        with wanted("cli", "lambda-maml"):
            from .cli import main as run
    except ModuleNotFoundError as missing:
        sys.exit(f"lambda-maml: error: {missing}")
    run()


if __name__ == "__main__":
    main()
