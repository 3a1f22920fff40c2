"""The earlytom command."""
