//! Getting a vCPU's thread out of the guest.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

const PAGE: usize = busway_pci::PAGE_SIZE as usize;

/// A second view of the first page of a vCPU's `kvm_run`, through which another thread says
/// `immediate_exit`. The two flags of the kernel's protocol are needed both: the byte for a thread
/// that is about to enter the guest, the signal for one that is there.
/// KVM API §5, `immediate_exit`.
#[derive(Debug)]
pub(super) struct Kick {
    page: NonNull<u8>,
}

// SAFETY: the page is shared memory, and the only access to it is atomic.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// For this vCPU.
    pub(super) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice, of a descriptor that is open;
        // nothing of this process's memory changes.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { page })
    }

    /// The next or the present run of the vCPU ends. `thread` is the one that runs it.
    pub(super) fn kick(&self, thread: libc::pthread_t) {
        // SAFETY: the offset is within the page, which is mapped for as long as `self` lives.
        let flag = unsafe {
            AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit)))
        };
        flag.store(1, Ordering::SeqCst);
        // SAFETY: the thread has not been joined: its `JoinHandle` gave the id and is still held.
        unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and no reference into it is left.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

/// Gives the signal a handler that does nothing: it only has to interrupt.
pub(super) fn prepare_signal() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), nothing) {
            log::error!("no handler for signal {}: {error}", SIGRTMIN());
        }
    });
}
