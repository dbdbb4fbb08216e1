//! libibverbs, loaded at run time: the entry points, and the devices that they open.
//!
//! A host without the library runs every other fabric; nothing here is touched until a device is
//! seen in sysfs.

#![allow(
    unsafe_code,
    reason = "calls a C library; with `wire`, all of the crate's verbs"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use libloading::Library;

use crate::rdma::RdmaError;
use crate::rdma::layout::{
    CompletionChannel, CompletionQueue, Context, Device, MemoryRegion, PortAttributes,
    ProtectionDomain, QueuePair, QueuePairAttributes, QueuePairInit,
};

/// The name that every distribution gives the library; its ABI has been the same since 2005.
const SONAME: &str = "libibverbs.so.1";

macro_rules! entry_points {
    ($($name:ident: $signature:ty = $symbol:literal;)*) => {
        /// The exported functions that this crate calls.
        pub(crate) struct Verbs {
            $(pub(crate) $name: $signature,)*
        }

        impl Verbs {
            fn load() -> Result<Self, libloading::Error> {
                // SAFETY: loading runs the library's constructors, which only read configuration;
                // it is the library that every RDMA program of the host uses.
                let library = unsafe { Library::new(SONAME) }?;
                // Never unloaded: drivers that it loads keep threads and memory of their own.
                let library: &'static Library = Box::leak(Box::new(library));
                Ok(Self {
                    // SAFETY: the signatures are those of <infiniband/verbs.h>, and the library
                    // stays loaded for as long as the pointers are used: for ever.
                    $($name: unsafe { *library.get::<$signature>($symbol)? },)*
                })
            }
        }
    };
}

entry_points! {
    get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut Device = b"ibv_get_device_list\0";
    free_device_list: unsafe extern "C" fn(*mut *mut Device) = b"ibv_free_device_list\0";
    get_device_name: unsafe extern "C" fn(*mut Device) -> *const c_char = b"ibv_get_device_name\0";
    open_device: unsafe extern "C" fn(*mut Device) -> *mut Context = b"ibv_open_device\0";
    close_device: unsafe extern "C" fn(*mut Context) -> c_int = b"ibv_close_device\0";
    query_port: unsafe extern "C" fn(*mut Context, u8, *mut PortAttributes) -> c_int
        = b"ibv_query_port\0";
    alloc_pd: unsafe extern "C" fn(*mut Context) -> *mut ProtectionDomain = b"ibv_alloc_pd\0";
    dealloc_pd: unsafe extern "C" fn(*mut ProtectionDomain) -> c_int = b"ibv_dealloc_pd\0";
    reg_mr: unsafe extern "C" fn(*mut ProtectionDomain, *mut c_void, usize, c_int)
        -> *mut MemoryRegion = b"ibv_reg_mr\0";
    dereg_mr: unsafe extern "C" fn(*mut MemoryRegion) -> c_int = b"ibv_dereg_mr\0";
    create_comp_channel: unsafe extern "C" fn(*mut Context) -> *mut CompletionChannel
        = b"ibv_create_comp_channel\0";
    destroy_comp_channel: unsafe extern "C" fn(*mut CompletionChannel) -> c_int
        = b"ibv_destroy_comp_channel\0";
    create_cq: unsafe extern "C" fn(
        *mut Context, c_int, *mut c_void, *mut CompletionChannel, c_int,
    ) -> *mut CompletionQueue = b"ibv_create_cq\0";
    destroy_cq: unsafe extern "C" fn(*mut CompletionQueue) -> c_int = b"ibv_destroy_cq\0";
    get_cq_event: unsafe extern "C" fn(
        *mut CompletionChannel, *mut *mut CompletionQueue, *mut *mut c_void,
    ) -> c_int = b"ibv_get_cq_event\0";
    ack_cq_events: unsafe extern "C" fn(*mut CompletionQueue, u32) = b"ibv_ack_cq_events\0";
    create_qp: unsafe extern "C" fn(*mut ProtectionDomain, *mut QueuePairInit) -> *mut QueuePair
        = b"ibv_create_qp\0";
    modify_qp: unsafe extern "C" fn(*mut QueuePair, *mut QueuePairAttributes, c_int) -> c_int
        = b"ibv_modify_qp\0";
    destroy_qp: unsafe extern "C" fn(*mut QueuePair) -> c_int = b"ibv_destroy_qp\0";
}

/// The library, loaded at the first call; what that call found holds for the life of the process.
pub(crate) fn verbs() -> Result<&'static Verbs, RdmaError> {
    static VERBS: OnceLock<Result<Verbs, String>> = OnceLock::new();
    VERBS
        .get_or_init(|| Verbs::load().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| RdmaError::NoLibrary(error.clone()))
}

/// A failed call: those that return a pointer set `errno`.
pub(crate) fn non_null<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// A failed call: most of those that return a number return the `errno`, some −1 and set it.
pub(crate) fn zero(returned: c_int) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

/// An open device, closed when the last link over it is gone.
pub(crate) struct OpenDevice {
    pub(crate) verbs: &'static Verbs,
    pub(crate) context: NonNull<Context>,
    pub(crate) name: String,
}

// SAFETY: verbs are thread-safe by the library's contract, and the context lives until Drop.
unsafe impl Send for OpenDevice {}
// SAFETY: as for Send.
unsafe impl Sync for OpenDevice {}

/// What a link must know of a port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortFacts {
    /// Code of the MTU in use: 1 is 256 bytes, each further one twice the last.
    pub(crate) mtu_code: u8,
    /// Longest message, in bytes.
    pub(crate) max_message_bytes: u32,
    /// The port's address within an InfiniBand subnet.
    pub(crate) lid: u16,
}

impl OpenDevice {
    /// Opens a device by the name that it has in sysfs.
    pub(crate) fn open(name: &str) -> Result<Arc<Self>, RdmaError> {
        let verbs = verbs()?;
        let failed = |error| RdmaError::Call {
            device: name.to_owned(),
            during: "opening it",
            error,
        };
        let mut num_devices = 0;
        // SAFETY: a valid place for the count; the list is freed below.
        let list =
            non_null(unsafe { (verbs.get_device_list)(&raw mut num_devices) }).map_err(failed)?;
        let num_devices = usize::try_from(num_devices).unwrap_or(0);
        let context = (0..num_devices).find_map(|at| {
            // SAFETY: the library says that the list has so many entries, and none is freed yet.
            let device = unsafe { *list.as_ptr().add(at) };
            // SAFETY: an entry of the list; its name is a C string that lives as long.
            let found = unsafe { CStr::from_ptr((verbs.get_device_name)(device)) };
            // SAFETY: an entry of the list.
            (found.to_bytes() == name.as_bytes())
                .then(|| non_null(unsafe { (verbs.open_device)(device) }))
        });
        // SAFETY: as returned above, once. Devices that are open stay valid.
        unsafe { (verbs.free_device_list)(list.as_ptr()) };
        let Some(context) = context else {
            return Err(RdmaError::NoDriver(name.to_owned()));
        };
        Ok(Arc::new(Self {
            verbs,
            context: context.map_err(failed)?,
            name: name.to_owned(),
        }))
    }

    /// Asks what a port is.
    pub(crate) fn port(&self, number: u8) -> Result<PortFacts, RdmaError> {
        let mut attributes = PortAttributes::default();
        // SAFETY: an open context, and a place that is at least as large as any library's struct.
        let returned =
            unsafe { (self.verbs.query_port)(self.context.as_ptr(), number, &raw mut attributes) };
        zero(returned).map_err(|error| self.failed("asking for a port", error))?;
        Ok(PortFacts {
            mtu_code: u8::try_from(attributes.active_mtu).unwrap_or(1).clamp(1, 5),
            // The specification's longest, for a driver that does not say.
            max_message_bytes: match attributes.max_msg_sz {
                0 => 1 << 31,
                max => max,
            },
            lid: attributes.lid,
        })
    }

    /// The error of a call that concerns this device.
    pub(crate) fn failed(&self, during: &'static str, error: io::Error) -> RdmaError {
        RdmaError::Call {
            device: self.name.clone(),
            during,
            error,
        }
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        // SAFETY: opened once, and everything that was made from it holds an Arc of this.
        if let Err(error) = zero(unsafe { (self.verbs.close_device)(self.context.as_ptr()) }) {
            tracing::error!(device = self.name, %error, "an RDMA device cannot be closed");
        }
    }
}
