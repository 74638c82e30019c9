"""Schema migrations, applied by `stifarm db upgrade`."""
