"""The EarlyTom operators, one file each: schema, native semantics, fake.

Imported as ``earlytom_compile.kernels``; ``all_ops`` registers every one of them. Nothing may be imported
here: python started in the repository root sees this folder as ``kernels``, which transformers probes.
"""
