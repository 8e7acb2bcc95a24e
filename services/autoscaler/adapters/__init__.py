"""Access to the outside: launchers, the registry, the store, databases and logs."""
