"""What happens to a model: reading, scoring, planning, surgery, repair and proof, free of devices and file formats."""

import os

# torch loads every installed device backend at import, and torch-npu without CANN makes `import torch` itself fail.
# This must run before the first import of torch; a user's own setting wins.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
