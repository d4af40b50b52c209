"""A program run again with a hook at every node.

compressed   what `Compressed` leaves state: bounds of a clip, values of padding
bodies       loops and branches around an interpreted body
machine      binds equations one by one, hands nodes to the hook
replay       `jm.evaluate`
segments     `jm.segments`: the program cut after named nodes
cut_program  a program as steps in order, and what is live where it is cut
lifted       `jm.lift`: trees with `Compressed` leaves
shared_programs  compiled programs that equal computations share, compiled ahead in threads
programs     compiled programs, kept as long as their model
staged       programs cut into stages: what comes before a change is kept
"""
