"""`python -m everyscope`, the same as the command `everyscope`."""

from everyscope.cli.main import main

if __name__ == "__main__":
    main()
