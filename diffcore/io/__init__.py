"""Files and settings: atomic and hashed files, plain data, specs and the parser of components, the
limits of what settings may name, optional dependencies, and the errors and output of commands.
"""
