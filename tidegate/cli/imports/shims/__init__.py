"""Files that an import puts beside the code of another system. They run in the models' Python."""
