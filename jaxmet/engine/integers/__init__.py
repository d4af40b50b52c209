"""The equations of a simulation run in integers.

integer_program     the equations one by one, in integers wherever a rule says how
integer_values      what a value is on the way: floats, integers on a grid, a sum in int32
grid_arithmetic     from floats, sums and other grids to the integers of a grid
integer_products    dots and convolutions of int8 in int32
integer_rules       what each equation does to integers
"""
