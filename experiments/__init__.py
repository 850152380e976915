"""Entry points: every experiment is a module to run and a file of flags."""
