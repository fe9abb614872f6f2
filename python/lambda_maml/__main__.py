"""`python -m lambda_maml`, the command line for torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
