"""`python -m hf_offline_compress` is the command line."""

from .cli import main

main()
