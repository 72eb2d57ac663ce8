"""`doctor`: what a program that loads a folder would trip over, and its repair in place."""
