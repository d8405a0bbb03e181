//! A VM's life by the client that is generated from Cloud Hypervisor's OpenAPI description: the crate
//! `cloud-hypervisor-client`, which takes an answer only where each of its fields has the described type.

use std::fs;

use cloud_hypervisor_client::apis::{DefaultApi as _, Error};
use cloud_hypervisor_client::models::{DiskConfig, VmConfig, VmRemoveDevice, VmResize};
use cloud_hypervisor_client::socket_based_api_client;

use crate::attentive::attentive;
use crate::served::Served;

/// The status of what was refused.
fn status<T: std::fmt::Debug>(answer: Result<T, Error>) -> u16 {
    match answer {
        Err(Error::Api(error)) => error.code.as_u16(),
        other => panic!("{other:?}"),
    }
}

/// Waits, a look at a time, until the VM has a device of this name, or has none.
macro_rules! device_is_there {
    ($client:expr, $id:expr, $there:expr) => {
        loop {
            let info = $client.vm_info_get().await.unwrap();
            let tree = info.device_tree.unwrap_or_default();
            if tree.contains_key($id) == $there {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
}

#[test]
fn the_client_that_is_generated_from_the_description_leads_a_vm_through_its_life() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let vm: VmConfig = serde_json::from_value(served.vm(&attentive())).unwrap();
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let client = socket_based_api_client(served.path("api"));
    runtime.block_on(async {
        let ping = client.vmm_ping_get().await.unwrap();
        assert!(ping.pid.is_some_and(|pid| pid > 0), "{ping:?}");
        assert_eq!(status(client.vm_info_get().await), 404);
        for _ in 0..2 {
            client.create_vm(vm.clone()).await.unwrap();
            assert_eq!(status(client.create_vm(vm.clone()).await), 500);
            client.boot_vm().await.unwrap();
            let mut data = DiskConfig::new();
            data.path = Some(disk.display().to_string());
            data.id = Some("data".to_owned());
            let added = client.vm_add_disk_put(data.clone()).await.unwrap();
            assert_eq!(added.id, "data");
            assert_eq!(status(client.vm_add_disk_put(data).await), 409);
            device_is_there!(client, "data", true);
            client.pause_vm().await.unwrap();
            assert_eq!(status(client.pause_vm().await), 500);
            client.resume_vm().await.unwrap();
            let mut gone = VmRemoveDevice::new();
            gone.id = Some("data".to_owned());
            client.vm_remove_device_put(gone).await.unwrap();
            device_is_there!(client, "data", false);
            let mut size = VmResize::new();
            size.desired_vcpus = Some(2);
            if let Err(error) = client.vm_resize_put(size).await {
                assert_eq!(status::<()>(Err(error)), 400);
            }
            client.reboot_vm().await.unwrap();
            client.shutdown_vm().await.unwrap();
            client.delete_vm().await.unwrap();
        }
        client.shutdown_vmm().await.unwrap();
    });
    assert_eq!(served.ended().0.code(), Some(0));
}
