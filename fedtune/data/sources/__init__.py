"""Data sets in the form their publishers give them, read by prefix (`natural-instructions:FOLDER`); named.py lists them."""
