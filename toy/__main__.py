"""`python -m toy`: the paper in miniature."""

from common import command_line
from toy.run import main

command_line(main)
