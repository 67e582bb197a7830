"""Find out which processes of the server have ended, and end a process that would wait for them for ever."""
