"""Entry point of `python -m rlhf`."""

from rlhf.cli.main import main

if __name__ == "__main__":
    main()
