"""Speed, memory and endurance: run by hand, from the root of the repository; nothing in the package imports this."""
