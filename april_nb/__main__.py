"""`python -m april_nb` is the command `april`."""
from april_nb.cli import main

if __name__ == "__main__": main()
