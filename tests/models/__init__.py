"""Our own writing of the residual nets users bring, each as its source meant it, and literally where that runs."""
