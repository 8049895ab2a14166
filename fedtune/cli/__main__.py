"""`python -m fedtune.cli` is the command `fedtune`."""

from fedtune.cli import main

if __name__ == "__main__":
    main()
