//! Getting a vCPU's thread out of the guest.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use busway_pci::{HostAddress, PAGE_SIZE};
use busway_vfio::Mapping;
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// A second view of the first page of a vCPU's `kvm_run`, through which another thread says
/// `immediate_exit`. The two flags of the kernel's protocol are needed both: the byte for a thread
/// that is about to enter the guest, the signal for one that is there.
/// KVM API §5, `immediate_exit`.
#[derive(Debug)]
pub(super) struct Kick {
    page: Mapping,
}

impl Kick {
    /// For this vCPU.
    pub(super) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu`, which stays borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let page = Mapping::of_file(fd, 0, 0, PAGE_SIZE, true)?;
        Ok(Self { page })
    }

    /// The next or the present run of the vCPU ends. `thread` is the one that runs it.
    pub(super) fn kick(&self, thread: libc::pthread_t) {
        let HostAddress(page) = self.page.address();
        let flag = (page + offset_of!(kvm_run, immediate_exit)) as *mut u8;
        // SAFETY: the byte is within the page, which is mapped, to be read and written, for as long as
        // `self` lives; every access to it in this process is atomic.
        let flag = unsafe { AtomicU8::from_ptr(flag) };
        flag.store(1, Ordering::SeqCst);
        // SAFETY: the thread has not been joined: its `JoinHandle` gave the id and is still held.
        unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
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
