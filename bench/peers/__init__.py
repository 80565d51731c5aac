"""What is measured beside this package: other programs, floors and ceilings."""
