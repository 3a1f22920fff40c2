"""The graph passes, one file each, run in order by ``manager``. Imported as ``earlytom_compile.passes``."""
