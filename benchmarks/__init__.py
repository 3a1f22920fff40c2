"""What ``earlytom bench`` measures: the same model with all its tokens and with fewer, in turn, in one process.

workload.py     a model and a prompt with a video of which is known how far it merges
arms.py         the ways to the first token that are compared
measure.py      interleaved times, decoding, memory, what was compiled
profiling.py    one call of each under a profiler, and breakdown.py, which reads from the trace where the time went
floor.py        the time the work takes at least, at the rates that ceilings.py measures
failures.py     what happens to an arm for which there is no memory
environment.py  machine, versions, date and command
results.py      tables, JSON and Markdown of all that, and result_plots.py, its plots
load.py         the same models with several clients at once, and load_results.py, its tables and plots

serving_load.py, apart from it, loads vLLM's server (vllm_server.py) with requests of serving_workload.py.
"""
