"""Sweeps: one config, many runs ("cells") that differ in a few settings, and a comparison of their results.

Each cell is a run of its own, in a workdir whose name says its settings: everything that holds of a run holds of a
cell, above all that it continues bit for bit after a kill. A sweep keeps nothing else: all it knows is in its command
and in the files of its cells. So the same command goes on after any kill, and several machines that share the folder,
or the jobs of a Slurm array, work on one sweep without a server: each takes a cell by its lock.

- `cells`: the cells of a grid or of random draws, with their names;
- `halving`: the step to which each cell is trained, for all steps or by successive halving;
- `pool`: claims, child processes and signals;
- `results`: how each cell ended; `statistics`: means, deviations and Welch's test; `report`: tables, CSV and a plot.

Optuna 5 (MIT, well kept) was considered for the search and left out. Its trials get their numbers and values from a
database in the order in which workers ask, so neither the name of a cell nor its index in an array would be known
before; a killed trial is replaced by another one; and its successive halving decides while other trials still
run, inside the process that trains, so the result depends on who came first. A draw that is a function of (seed, trial)
and a ranking at each rung are shorter than the adapter would be, and need no SQLAlchemy.
"""
