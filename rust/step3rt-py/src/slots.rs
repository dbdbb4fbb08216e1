//! Lends a slot to Python as a `memoryview`, without a copy. It never writes to a slot itself.

#![allow(unsafe_code, reason = "the buffer protocol hands out raw pointers")]

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use step3rt_fabric::contract::SlotMemory;

/// Owns a share of a slot's memory for as long as any view of it lives.
#[pyclass(frozen, module = "step3rt._core")]
struct Slot {
    memory: Arc<dyn SlotMemory>,
    is_writable: bool,
}

/// A view of `memory`: bytes, one dimension, the same address every time.
pub(crate) fn view_of(
    py: Python<'_>,
    memory: Arc<dyn SlotMemory>,
    is_writable: bool,
) -> PyResult<Bound<'_, PyMemoryView>> {
    let slot = Bound::new(
        py,
        Slot {
            memory,
            is_writable,
        },
    )?;
    PyMemoryView::from(&slot)
}

#[pymethods]
impl Slot {
    /// # Safety
    ///
    /// `view` must be null or point to a `Py_buffer` that Python lets this call fill.
    unsafe fn __getbuffer__(
        slf: &Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no place for the view of a slot"));
        }
        let slot = slf.get();
        let len = ffi::Py_ssize_t::try_from(slot.memory.len())
            .map_err(|_| PyBufferError::new_err("the slot is larger than any buffer of Python"))?;
        // SAFETY: `view` is not null and is Python's to fill. `memory` keeps `len` bytes at this
        // address mapped as long as an `Arc` lives; the filled view owns a reference to `slf`, and
        // so to its `Arc`, until Python releases the view. Who may write when is the fabric's
        // alternation, which both ends obey; the read-only flag keeps Python from writing to a
        // mapping without the right to write.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                slot.memory.as_ptr().cast(),
                len,
                c_int::from(!slot.is_writable),
                flags,
            )
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
