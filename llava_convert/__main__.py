"""`python -m llava_convert`: the command, for launchers such as torchrun that start modules."""

from llava_convert.cli import main

if __name__ == "__main__":
    main()
