"""Files that people see: pictures, videos, what is written into them, and where they are put."""
