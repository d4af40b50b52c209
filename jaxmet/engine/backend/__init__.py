"""What XLA:CPU does badly, in an equal form.

cpu      which convolutions are replaced, chosen when a program is lowered
shifts   convolutions as sums of shifted inputs times a number
"""
