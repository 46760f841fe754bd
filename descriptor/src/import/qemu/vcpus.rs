//! The page tables that the vCPUs use, from QEMU's own description of the device state.

use serde::Deserialize;

use super::stream::Stream;

/// The bit of CR0 that turns paging on.
const PAGING: u64 = 1 << 31;

#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    vmsd_name: Option<String>,
    instance_id: Option<u32>,
    version: Option<u32>,
    #[serde(default)]
    fields: Vec<Field>,
}

#[derive(Deserialize)]
struct Field {
    name: String,
    size: Option<usize>,
    array_len: Option<usize>,
}

/// CR3 of each vCPU of an x86 machine that has paging turned on; `None` where the description or the state is not as expected.
pub(super) fn page_tables(stream: &Stream) -> Option<Vec<u64>> {
    let description: Description = serde_json::from_str(&stream.vm_description).ok()?;
    let mut tables = Vec::new();
    let mut vcpus = 0;
    for device in description.devices.iter().filter(|device| device.vmsd_name.as_deref() == Some("cpu")) {
        let state = state_of(device, &stream.device_state)?;
        let register = |name| {
            let bytes = state.get(offset_of(device, name)?..)?.first_chunk()?;
            Some(u64::from_be_bytes(*bytes))
        };
        vcpus += 1;
        let (control, table) = (register("env.cr[0]")?, register("env.cr[3]")?);
        if control & PAGING != 0 {
            tables.push(table);
        }
    }
    (vcpus > 0).then_some(tables)
}

/// What follows the header of the device's section.
fn state_of<'s>(device: &Device, state: &'s [u8]) -> Option<&'s [u8]> {
    const SECTION_FULL: u8 = 4;
    let mut name = vec![u8::try_from(device.name.len()).ok()?];
    name.extend_from_slice(device.name.as_bytes());
    name.extend_from_slice(&device.instance_id?.to_be_bytes());
    name.extend_from_slice(&device.version?.to_be_bytes());
    // The sections have no length, and vCPUs come among the first.
    let at = state.windows(name.len()).enumerate();
    let mut at = at.filter(|(at, bytes)| *bytes == name && *at >= 5 && state[at - 5] == SECTION_FULL);
    at.next().map(|(at, _)| &state[at + name.len()..])
}

/// Where a field begins, which is none of an array.
fn offset_of(device: &Device, name: &str) -> Option<usize> {
    let mut offset = 0usize;
    for field in &device.fields {
        if field.name == name {
            return (field.size == Some(8) && field.array_len.is_none()).then_some(offset);
        }
        offset = offset.checked_add(field.size?.checked_mul(field.array_len.unwrap_or(1))?)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::qemu::stream::testing::{DEVICES, StreamBuilder};

    const FIELDS: &str = r#"[{"name": "env.regs", "array_len": 2, "type": "uint64", "size": 8},
        {"name": "env.segs", "array_len": 2, "type": "struct", "struct": {"fields": [{"size": 20}]}, "size": 20},
        {"name": "env.cr[0]", "type": "uint64", "size": 8}, {"name": "env.cr[2]", "type": "uint64", "size": 8},
        {"name": "env.cr[3]", "type": "uint64", "size": 8}, {"name": "late", "size": 1}]"#;

    fn description(fields: &str) -> String {
        let cpu = |instance: u32| {
            format!(
                r#"{{"name": "cpu", "instance_id": {instance}, "vmsd_name": "cpu", "version": 12, "fields": {fields}}}"#
            )
        };
        format!(r#"{{"page_size": 4096, "devices": [{{"name": "timer", "fields": []}}, {}, {}]}}"#, cpu(0), cpu(1))
    }

    fn cpu(stream: StreamBuilder, instance: u32, cr0: u64, cr3: u64) -> StreamBuilder {
        let stream = stream.raw(&[4]).be32(7).cstr("cpu").be32(instance).be32(12).raw(&[0x11; 16 + 40]);
        stream.be64(cr0).be64(0x22).be64(cr3).raw(&[0x33, 0x7e]).be32(7)
    }

    fn stream(first_cr0: u64, description: String) -> Stream {
        let state = cpu(StreamBuilder::default().raw(&DEVICES), 0, first_cr0, 0x1234_5000);
        let device_state = cpu(state, 1, 0x8005_0033, 0x6789_a000).bytes;
        let bytes = StreamBuilder::new(&[]).ram_start(0).end_of_section().devices().bytes;
        let empty = Stream::parse(&bytes.as_slice()).unwrap();
        Stream { device_state, vm_description: description, ..empty }
    }

    #[test]
    fn each_vcpu_with_paging_tells() {
        assert_eq!(page_tables(&stream(0x8000_0001, description(FIELDS))), Some(vec![0x1234_5000, 0x6789_a000]));
        assert_eq!(page_tables(&stream(0x6000_0010, description(FIELDS))), Some(vec![0x6789_a000]), "in its firmware");
    }

    #[test]
    fn what_is_not_understood_tells_nothing() {
        for fields in ["[]", r#"[{"name": "env.cr[0]", "size": 8}]"#, &FIELDS.replace("20}]}, \"size\": 20", "20}]}")] {
            assert_eq!(page_tables(&stream(0x8000_0001, description(fields))), None, "{fields}");
        }
        let cut = description(FIELDS).replace("\"size\": 20}]}, \"size\": 20", "\"size\": 20}]}, \"size\": 99999999");
        assert_eq!(page_tables(&stream(0x8000_0001, cut)), None, "beyond the state");
        assert_eq!(page_tables(&stream(0x8000_0001, description(FIELDS).replace("12", "13"))), None, "no such section");
        assert_eq!(page_tables(&stream(0x8000_0001, r#"{"devices": []}"#.to_owned())), None, "no x86 machine");
        assert_eq!(page_tables(&stream(0x8000_0001, "{".to_owned())), None);
    }
}
