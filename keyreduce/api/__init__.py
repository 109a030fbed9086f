"""The use cases, a module a verb: each has a frozen request, a result, and ``run(request, reporter)``.

A request is the one declaration of a verb's settings: their names, types, defaults, choices, help and environment
variables. The command line, recipes of sweeps and the tasks of other processes are all made from it. Nothing heavy is
imported here when a module is loaded.
"""
