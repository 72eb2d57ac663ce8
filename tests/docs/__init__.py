"""Pages of docs/ that are made of tables, and the tests that they are in step."""
