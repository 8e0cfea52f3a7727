"""What other libraries call, or hand their own arrays to: one module for each."""
