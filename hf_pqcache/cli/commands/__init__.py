"""One file a command of `pqcache`: the file is its registration, the object `command` in it is what click runs."""
