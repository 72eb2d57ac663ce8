"""Reports for people: one self-contained HTML page each, of what was compared or scored."""
