"""The processes of one machine: the daemon behind a mount, the volume directory it owns, and its control socket."""
