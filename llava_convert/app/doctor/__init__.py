"""`doctor`: the problems that a program would have with a folder, and their repair in place."""
