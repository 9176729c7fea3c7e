"""The native build: finds the toolchain, writes build.ninja and runs it. Standard library only.

``setup.py`` uses it for wheels and installs; ``python -m build_tools`` builds a checkout in place.
Nothing here imports torch: its headers and libraries are found by path.
"""
