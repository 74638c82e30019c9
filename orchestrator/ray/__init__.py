"""Ray: the only package that imports it.

``pool``: the controller's cluster, a local one or that of the lab hosts. ``join``: what a lab host runs.
Ray is imported when something of it starts, not before: verbs that need none do not wait for it. Errors of
our tree pass between processes as they are; everything else of Ray's becomes a PoolError.
"""
