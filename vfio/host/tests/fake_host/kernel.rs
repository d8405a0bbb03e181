//! The kernel of a made-up host: it changes the tree as the real one answers writes to sysfs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use busway_host::{Kernel, Readers, Standing, VfSetting, VfState};

use super::line::Line;
use super::{FakeHost, link_name};

impl FakeHost {
    pub fn kernel(&self) -> FakeKernel {
        FakeKernel {
            host: self.path(""),
            bus: self.path("sys/bus/pci"),
            native: self.native.clone(),
            habits: self.habits.clone(),
            log: Vec::new(),
            fails: Box::new(|_, _| None),
            deaf_to: None,
            vf_states: BTreeMap::new(),
            dies_at: None,
            standing: BTreeMap::new(),
            udev: None,
            unplug_at: None,
        }
    }

    /// `kernel-does fail REQUEST ERRNO` or `kernel-does vanish DEVICE OTHER` of a description.
    pub(super) fn kernel_does(&mut self, line: &Line) {
        self.habits.push(match &*line.bare(0) {
            "fail" => Habit::Fail {
                request: line.bare(1),
                errno: line.bare(2).parse().unwrap(),
            },
            "vanish" => Habit::Vanish {
                with: line.bare(1),
                device: line.bare(2),
            },
            _ => line.wrong("the kernel does no such thing"),
        });
    }
}

/// What the kernel of one host does and others do not.
#[derive(Clone, Debug)]
pub enum Habit {
    /// A request that contains this text fails.
    Fail { request: String, errno: i32 },
    /// When the device `with` loses its driver, `device` is no more.
    Vanish { with: String, device: String },
}

/// Given a request's number and text: the errno that it fails with, if it is to fail.
pub type Fails = Box<dyn FnMut(usize, &str) -> Option<i32>>;

/// Answers writes as the kernel does (drivers/base/bus.c, drivers/pci/pci-driver.c).
pub struct FakeKernel {
    host: PathBuf,
    bus: PathBuf,
    native: BTreeMap<String, String>,
    habits: Vec<Habit>,
    /// What was asked for: `ATTRIBUTE VALUE` below the bus's folder or the host's, or a word for what
    /// else was asked, such as `modprobe NAME`.
    pub log: Vec<String>,
    /// Whether the request with this number (from 0) and text fails, and with which errno.
    pub fails: Fails,
    /// Requests that begin so are taken, and have no effect.
    pub deaf_to: Option<&'static str>,
    /// What virtual functions were set to.
    pub vf_states: BTreeMap<u32, VfState>,
    /// From the request with this number on none is carried out, as if the process had been killed.
    pub dies_at: Option<usize>,
    /// What is not root's alone to write.
    pub standing: BTreeMap<PathBuf, Standing>,
    /// The process that udev has a new device looked at by, until it has settled.
    pub udev: Option<u32>,
    /// Takes this device away at the request with this number.
    pub unplug_at: Option<(usize, String)>,
}

impl std::fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeKernel")
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

impl FakeKernel {
    fn asked(&mut self, request: String) -> io::Result<()> {
        let number = self.log.len();
        let dead = self.dies_at.is_some_and(|at| number >= at);
        let habit = self.habits.iter().find_map(|habit| match habit {
            Habit::Fail {
                request: text,
                errno,
            } if request.contains(text) => Some(*errno),
            _ => None,
        });
        let failure = (self.fails)(number, &request)
            .or(dead.then_some(libc::EIO))
            .or(habit);
        self.log.push(request);
        if let Some((at, address)) = &self.unplug_at
            && *at == number
        {
            self.take_away(address)?;
        }
        failure.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// Removes a device, with what its driver made.
    fn take_away(&self, address: &str) -> io::Result<()> {
        let device = self.bus.join("devices").join(address);
        let folder = device.canonicalize()?;
        let group = folder.join("iommu_group/devices").join(address);
        let classes = fs::read_dir(self.host.join("sys/class"))?;
        for class in classes.flatten() {
            for link in fs::read_dir(class.path())?.flatten() {
                let target = link.path().canonicalize();
                if target.is_ok_and(|target| target.starts_with(&folder)) {
                    fs::remove_file(link.path())?;
                }
            }
        }
        // A device need not be in a group.
        let _ = fs::remove_file(group);
        fs::remove_dir_all(folder)?;
        fs::remove_file(device)
    }

    fn device(&self, address: &str) -> io::Result<PathBuf> {
        let device = self.bus.join("devices").join(address);
        device
            .canonicalize()
            .map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn set(&self, device: &Path) -> Option<String> {
        let text = fs::read_to_string(device.join("driver_override")).unwrap();
        Some(text.trim().to_owned()).filter(|text| text != "(null)")
    }

    fn matches(&self, address: &str, device: &Path, driver: &str) -> bool {
        match self.set(device) {
            Some(set) => set == driver,
            None => self
                .native
                .get(address)
                .is_some_and(|native| native == driver),
        }
    }

    fn attach(&self, device: &Path, driver: &str) -> io::Result<()> {
        symlink(self.bus.join("drivers").join(driver), device.join("driver"))?;
        if !driver.contains("vfio") {
            return Ok(());
        }
        // drivers/vfio/vfio_main.c: a node for the group, and one for the device.
        let address = device.file_name().unwrap().to_str().unwrap();
        let node = format!("vfio{}", address.replace([':', '.'], ""));
        fs::create_dir_all(device.join("vfio-dev").join(&node))?;
        let vfio = self.host.join("dev/vfio");
        fs::create_dir_all(vfio.join("devices"))?;
        fs::write(vfio.join("devices").join(node), "")?;
        match link_name(&device.join("iommu_group")) {
            Some(group) => fs::write(vfio.join(group), ""),
            None => Ok(()),
        }
    }

    fn detach(&self, device: &Path) -> io::Result<()> {
        let driver = link_name(&device.join("driver")).unwrap();
        fs::remove_file(device.join("driver"))?;
        for habit in &self.habits {
            if let Habit::Vanish { with, device: gone } = habit
                && device.ends_with(with)
                && self.bus.join("devices").join(gone).exists()
            {
                self.take_away(gone)?;
            }
        }
        if !driver.contains("vfio") {
            return Ok(());
        }
        let vfio = self.host.join("dev/vfio");
        let mut nodes = Vec::new();
        // Where it was bound by the tree's maker, there need be none.
        if let Ok(entries) = fs::read_dir(device.join("vfio-dev")) {
            let names = entries.map(|entry| entry.unwrap().file_name());
            nodes.extend(names.map(|name| vfio.join("devices").join(name)));
            fs::remove_dir_all(device.join("vfio-dev"))?;
        }
        let group = device.join("iommu_group");
        let mut members = fs::read_dir(group.join("devices"))?;
        let stays = members.any(|member| {
            let driver = link_name(&member.unwrap().path().join("driver"));
            driver.is_some_and(|driver| driver.contains("vfio"))
        });
        if !stays {
            nodes.extend(link_name(&group).map(|group| vfio.join(group)));
        }
        for node in nodes {
            let _ = fs::remove_file(owner(&node));
            let _ = fs::remove_file(node);
        }
        Ok(())
    }

    /// Makes or removes virtual functions, each in a group of its own from 100 up.
    fn virtual_functions(&mut self, physical: &str, count: u32) -> io::Result<()> {
        let folder = self.device(physical)?;
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("virtfn")
            {
                let function = path.canonicalize()?;
                let name = function.file_name().unwrap().to_owned();
                fs::remove_file(self.bus.join("devices").join(&name))?;
                self.native.remove(name.to_str().unwrap());
                fs::remove_dir_all(function)?;
                fs::remove_file(path)?;
            }
        }
        let bus = physical.rsplit_once(':').unwrap().0.to_owned();
        for index in 0..count {
            let address = format!("{bus}:10.{index}");
            let function = folder.parent().unwrap().join(&address);
            fs::create_dir(&function)?;
            for (name, text) in [
                ("vendor", "0x8086"),
                ("device", "0x10ca"),
                ("class", "0x020000"),
                ("driver_override", "(null)"),
                ("modalias", "pci:v00008086d000010CA"),
            ] {
                fs::write(function.join(name), format!("{text}\n"))?;
            }
            let group = self
                .host
                .join(format!("sys/kernel/iommu_groups/{}", 100 + index));
            fs::create_dir_all(group.join("devices"))?;
            let _ = fs::remove_file(group.join("devices").join(&address));
            symlink(&function, group.join("devices").join(&address))?;
            symlink(&group, function.join("iommu_group"))?;
            symlink(&folder, function.join("physfn"))?;
            symlink(&function, folder.join(format!("virtfn{index}")))?;
            symlink(&function, self.bus.join("devices").join(&address))?;
            self.native.insert(address, "igbvf".to_owned());
            fs::create_dir_all(self.bus.join("drivers/igbvf"))?;
            let probes = fs::read_to_string(folder.join("sriov_drivers_autoprobe"));
            if probes.map_or(true, |text| text.trim() == "1") {
                self.attach(&function, "igbvf")?;
            }
        }
        fs::write(folder.join("sriov_numvfs"), format!("{count}\n"))
    }
}

/// Where the owner of a node is written, for only root can give it away.
fn owner(node: &Path) -> PathBuf {
    node.with_file_name(format!("{}.owner", node.file_name().unwrap().display()))
}

impl Kernel for FakeKernel {
    fn write(&mut self, attribute: &Path, value: &str) -> io::Result<()> {
        let below = attribute.strip_prefix(&self.bus);
        let below = below.or_else(|_| attribute.strip_prefix(&self.host));
        let below = below.unwrap().to_owned();
        let request = format!("{} {}", below.display(), value.trim());
        let deaf = self.deaf_to.is_some_and(|deaf| request.starts_with(deaf));
        self.asked(request)?;
        if deaf {
            return Ok(());
        }
        let parts: Vec<_> = below.iter().map(|part| part.to_str().unwrap()).collect();
        let errno = |errno| Err(io::Error::from_raw_os_error(errno));
        match parts[..] {
            ["devices", address, "driver_override"] => {
                let device = self.device(address)?;
                let text = if value.trim().is_empty() {
                    "(null)"
                } else {
                    value.trim()
                };
                fs::write(device.join("driver_override"), format!("{text}\n"))
            }
            ["drivers", driver, "unbind"] => {
                let device = self.device(value)?;
                if link_name(&device.join("driver")).as_deref() != Some(driver) {
                    return errno(libc::ENODEV);
                }
                self.detach(&device)
            }
            ["devices", address, "sriov_numvfs"] => {
                self.virtual_functions(address, value.trim().parse().unwrap())
            }
            ["devices", _, "sriov_drivers_autoprobe"] => fs::write(attribute, value),
            ["proc", "sys", "vm", "compact_memory"] => Ok(()),
            [.., pool, "nr_hugepages"] if pool.starts_with("hugepages-") => {
                // As many as there is room for.
                let room = fs::read_to_string(attribute.with_file_name("room")).unwrap();
                let count: u64 = value.trim().parse().unwrap();
                let count = count.min(room.trim().parse().unwrap());
                fs::write(
                    attribute.with_file_name("free_hugepages"),
                    format!("{count}\n"),
                )?;
                fs::write(attribute, format!("{count}\n"))
            }
            ["drivers", driver, "bind"] => {
                let device = self.device(value)?;
                if !self.bus.join("drivers").join(driver).exists() {
                    return errno(libc::ENOENT);
                }
                if !self.matches(value, &device, driver) {
                    return errno(libc::ENODEV);
                }
                if device.join("driver").exists() {
                    return errno(libc::EBUSY);
                }
                self.attach(&device, driver)
            }
            ["drivers_probe"] => {
                let device = self.device(value)?;
                let wanted = self
                    .set(&device)
                    .or_else(|| self.native.get(value).cloned());
                // drivers/pci/pci-driver.c, pci_device_can_probe
                let autoprobe = device.join("physfn/sriov_drivers_autoprobe");
                let off = fs::read_to_string(autoprobe).is_ok_and(|text| text.trim() == "0");
                let wanted = wanted.filter(|_| !off || self.set(&device).is_some());
                let loaded = wanted.filter(|d| self.bus.join("drivers").join(d).exists());
                match loaded.filter(|_| !device.join("driver").exists()) {
                    Some(driver) => self.attach(&device, &driver),
                    None => Ok(()),
                }
            }
            _ => panic!("nobody writes to {}", attribute.display()),
        }
    }

    fn load_module(&mut self, name: &str) -> io::Result<()> {
        self.asked(format!("modprobe {name}"))?;
        // A modalias loads what was made for it, which the tree names where it is not loaded yet.
        let driver = if name.starts_with("pci:") {
            fs::read_to_string(self.host.join("modules").join(name))?
        } else {
            let folder = self.host.join("sys/module").join(name.replace('-', "_"));
            let known = fs::read_dir(folder.join("drivers")).ok();
            let known =
                known.and_then(|mut names| names.next()?.ok()?.file_name().into_string().ok());
            let known = known.and_then(|name| name.strip_prefix("pci:").map(str::to_owned));
            known.unwrap_or_else(|| name.to_owned())
        };
        fs::create_dir_all(self.bus.join("drivers").join(driver))
    }

    fn own(&mut self, node: &Path, user: u32) -> io::Result<()> {
        let below = node.strip_prefix(&self.host).unwrap().display();
        self.asked(format!("chown {user} {below}"))?;
        fs::metadata(node)?;
        fs::write(owner(node), user.to_string())
    }

    fn wait_for_udev(&mut self) {
        if let Some(pid) = self.udev.take() {
            fs::remove_dir_all(self.host.join(format!("proc/{pid}"))).unwrap();
        }
    }

    fn owner(&self, node: &Path) -> io::Result<u32> {
        fs::metadata(node)?;
        let text = fs::read_to_string(owner(node)).unwrap_or_else(|_| "0".to_owned());
        Ok(text.parse().unwrap())
    }

    fn save(&mut self, path: &Path, text: &str, readers: Readers) -> io::Result<()> {
        let below = path.strip_prefix(&self.host).unwrap().display();
        self.asked(format!("save {below}"))?;
        fs::create_dir_all(path.parent().unwrap())?;
        fs::write(path, text)?;
        let mode = match readers {
            Readers::Owner => 0o600,
            Readers::Everybody => 0o644,
        };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }

    /// All is root's, and nobody else's to write, but for what a test says.
    fn standing(&self, path: &Path) -> io::Result<Standing> {
        let roots = Standing {
            owner: 0,
            mode: 0o755,
            is_link: false,
        };
        Ok(self.standing.get(path).copied().unwrap_or(roots))
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let below = path.strip_prefix(&self.host).unwrap().display();
        self.asked(format!("remove {below}"))?;
        fs::remove_file(path)
    }

    fn set_vf(&mut self, interface: u32, vf: u32, setting: VfSetting) -> io::Result<()> {
        self.asked(format!("set interface {interface} vf {vf} {setting}"))?;
        let state = self.vf_states.entry(vf).or_default();
        match setting {
            VfSetting::Mac(mac) => state.mac = Some(mac),
            VfSetting::Vlan(id) => state.vlan = Some(id).filter(|&id| id != 0),
            VfSetting::Trust(on) => state.trust = Some(on),
            VfSetting::SpoofCheck(on) => state.spoof_check = Some(on),
        }
        Ok(())
    }

    fn vf_states(&self, _interface: u32) -> io::Result<BTreeMap<u32, VfState>> {
        Ok(self.vf_states.clone())
    }
}
