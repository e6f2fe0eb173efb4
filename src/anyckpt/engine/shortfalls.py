"""What file systems could not give of what is promised of outputs, in sentences for a user."""

NO_LOCKS = (
    "this file system has no locks, so that another process on another machine that writes the same output at the same "
    "moment would not be noticed"
)
NOT_DURABLE = (
    "this file system does not say when files and names are on its disks (it refuses fsync), so that a failure of its "
    "machine right now may take the output"
)
MAY_REPLACE = (
    "this file system gives no name only if it is free, so that a file that another process gave the same name at the "
    "same moment would have been replaced"
)
TWO_STEPS = (
    "this file system does not exchange directories in one step, so that for a moment neither the old output nor the "
    "new one had the name"
)
