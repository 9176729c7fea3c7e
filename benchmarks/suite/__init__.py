"""One module for each benchmark. It has ``add_arguments(parser)``, ``run(options) -> dict`` (what goes into the JSON)
and ``report(result) -> str``, and may have ``COMMITTED``, by kind of device the flags that write its committed results:
``all`` runs those of every module. A new benchmark is a new file."""
