"""``python -m ensembler``: the same as the command ``ensembler``."""

from ensembler.cli.main import main

if __name__ == "__main__":
    main()
