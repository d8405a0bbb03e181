//! A device by VFIO without an IOMMU. Linux, Documentation/driver-api/vfio.rst.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_NOIOMMU_IOMMU, VFIO_PCI_CONFIG_REGION_INDEX, vfio_region_info,
};

// linux/vfio.h: _IO(';', 100 + n)
const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::c_ulong = 0x3b6a;
const DEVICE_GET_REGION_INFO: libc::c_ulong = 0x3b6c;
const DEVICE_SET_IRQS: libc::c_ulong = 0x3b6e;

/// PCIe 6.0 §7.5.1.1.3: the command register, and in it memory decoding and bus mastering.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// An open device. The kernel gives it back its state from before when it is closed.
#[derive(Debug)]
pub(crate) struct VfioDevice {
    device: File,
    // In the order in which VFIO has them closed.
    _group: File,
    _container: File,
}

fn check(what: &str, result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(error).with_context(|| what.to_owned());
    }
    Ok(result)
}

fn put(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {text} to {path}"))
}

fn open(path: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("opening {path}"))
}

impl VfioDevice {
    /// Takes a device from whatever driver it has, opens it, and lets it reach memory.
    pub(crate) fn open(address: &str) -> Result<Self> {
        let folder = format!("/sys/bus/pci/devices/{address}");
        // Where it is a module, nothing has loaded it yet; where it is built in, there is no such module.
        Command::new("modprobe")
            .args(["-q", "vfio-pci"])
            .status()
            .context("running modprobe")?;
        put(
            "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
            "Y",
        )?;
        let driver = fs::read_link(format!("{folder}/driver")).unwrap_or_default();
        if !driver.ends_with("vfio-pci") {
            if Path::new(&folder).join("driver").exists() {
                put(&format!("{folder}/driver/unbind"), address)?;
            }
            put(&format!("{folder}/driver_override"), "vfio-pci")?;
            put("/sys/bus/pci/drivers_probe", address)?;
        }
        let group = fs::read_link(format!("{folder}/iommu_group"))
            .with_context(|| format!("{address} has no group: VFIO did not take it"))?;
        let group = group.file_name().unwrap_or_default().display();
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/noiommu-{group}"))?;
        let container_fd = container.as_raw_fd();
        // SAFETY: the call reads one number through the pointer.
        let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &container_fd) };
        check("VFIO_GROUP_SET_CONTAINER", result)?;
        // SAFETY: the argument is a number.
        let result = unsafe {
            libc::ioctl(
                container_fd,
                SET_IOMMU,
                libc::c_ulong::from(VFIO_NOIOMMU_IOMMU),
            )
        };
        check("VFIO_SET_IOMMU", result)?;
        let name = std::ffi::CString::new(address)?;
        // SAFETY: the call reads a string that ends with a zero.
        let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        let descriptor = check("VFIO_GROUP_GET_DEVICE_FD", result)?;
        let opened = Self {
            // SAFETY: the kernel just made the descriptor, for us alone.
            device: unsafe { File::from_raw_fd(descriptor) },
            _group: group,
            _container: container,
        };
        opened.enable()?;
        Ok(opened)
    }

    fn enable(&self) -> Result<()> {
        let mut info = vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            index: VFIO_PCI_CONFIG_REGION_INDEX,
            ..Default::default()
        };
        // SAFETY: the structure is the one that the call fills, and says its size.
        let result = unsafe {
            libc::ioctl(
                self.device.as_raw_fd(),
                DEVICE_GET_REGION_INFO,
                &raw mut info,
            )
        };
        check("VFIO_DEVICE_GET_REGION_INFO", result)?;
        let mut command = [0; 2];
        let at = info.offset + COMMAND;
        self.device.read_exact_at(&mut command, at)?;
        let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
        self.device.write_all_at(&command.to_le_bytes(), at)?;
        Ok(())
    }

    /// Has every vector of a kind of interrupt, from the first on, signal one of these eventfds.
    pub(crate) fn connect(&self, index: u32, events: &[File]) -> Result<()> {
        let descriptors = events
            .iter()
            .map(|event| event.as_raw_fd() as u32)
            .collect();
        self.set_irqs(
            VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            index,
            events.len(),
            descriptors,
        )
    }

    /// Lets the pin interrupt again, which the kernel masks at each interrupt.
    pub(crate) fn unmask(&self, index: u32) -> Result<()> {
        self.set_irqs(
            VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK,
            index,
            1,
            Vec::new(),
        )
    }

    fn set_irqs(&self, flags: u32, index: u32, count: usize, data: Vec<u32>) -> Result<()> {
        // linux/vfio.h, `struct vfio_irq_set`: argsz, flags, index, start, count, data.
        let size = (5 + data.len()) * size_of::<u32>();
        let header = [u32::try_from(size)?, flags, index, 0, u32::try_from(count)?];
        let words: Vec<u32> = header.into_iter().chain(data).collect();
        // SAFETY: the call reads as many bytes as the first word says, which is all of them.
        let result =
            unsafe { libc::ioctl(self.device.as_raw_fd(), DEVICE_SET_IRQS, words.as_ptr()) };
        ensure!(
            check("VFIO_DEVICE_SET_IRQS", result)? == 0,
            "the kernel has fewer than {count} vectors"
        );
        Ok(())
    }
}
