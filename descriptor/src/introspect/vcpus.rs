//! Which page tables the vCPUs use, as the hypervisor's records tell.

use super::Refusal;
use crate::Descriptor;
use crate::import::qemu::record::name::PAGE_TABLES;
use crate::vm::Hypervisor;

/// The record of Xen with the vCPUs' registers, behind a header of eight bytes: type and length.
const HVM_CONTEXT: &str = "libxc/HVM_CONTEXT";

/// In it, the type of a vCPU's part (`HVM_SAVE_CODE(CPU)`), and where CR0 and CR3 lie in that (`struct hvm_hw_cpu`): behind the
/// FPU's 512 bytes, sixteen registers, RIP and RFLAGS.
const CPU: u16 = 2;
const CR0: usize = 512 + 18 * 8;
const CR3: usize = CR0 + 16;

/// The bit of CR0 that turns paging on.
const PAGING: u64 = 1 << 31;

/// CR3 of every vCPU that uses paging; `None` for memory that came without vCPUs.
///
/// # Errors
/// When there are vCPUs, and their registers are not where they should be.
pub(super) fn page_tables(descriptor: &Descriptor) -> Result<Option<Vec<u64>>, Refusal> {
    let record = |name: &str| {
        let record = descriptor.records.iter().find(|record| record.name == name);
        record.map(|record| record.data.as_slice()).ok_or(Refusal::NoVcpus)
    };
    match descriptor.identity.hypervisor {
        Hypervisor::Qemu => {
            let (tables, rest) = record(PAGE_TABLES)?.as_chunks();
            if !rest.is_empty() {
                return Err(Refusal::NoVcpus);
            }
            Ok(Some(tables.iter().map(|table| u64::from_le_bytes(*table)).collect()))
        }
        Hypervisor::Xen => of_xen(record(HVM_CONTEXT)?.get(8..).unwrap_or_default()).ok_or(Refusal::NoVcpus).map(Some),
        _ => Ok(None),
    }
}

fn of_xen(mut context: &[u8]) -> Option<Vec<u64>> {
    let mut tables = Vec::new();
    let mut vcpus = 0;
    while let Some((header, rest)) = context.split_first_chunk::<8>() {
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let part = rest.get(..length)?;
        if u16::from_le_bytes([header[0], header[1]]) == CPU {
            let register = |at: usize| part.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            vcpus += 1;
            let (control, table) = (register(CR0)?, register(CR3)?);
            if control & PAGING != 0 {
                tables.push(table);
            }
        }
        context = &rest[length..];
    }
    (vcpus > 0).then_some(tables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::xen::stream::Stream;

    fn part(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut part = kind.to_le_bytes().to_vec();
        part.extend([0, 0]);
        part.extend((body.len() as u32).to_le_bytes());
        part.extend(body);
        part
    }

    fn vcpu(cr0: u64, cr3: u64) -> Vec<u8> {
        let mut body = vec![0; 1024];
        body[656..664].copy_from_slice(&cr0.to_le_bytes());
        body[672..680].copy_from_slice(&cr3.to_le_bytes());
        part(CPU, &body)
    }

    #[test]
    fn a_real_stream_of_xen_tells() {
        let mut stream = &include_bytes!("../../tests/data/xen-4.17-pvh.xl")[..];
        let stream = Stream::parse(&mut stream).unwrap();
        let record = stream.records.iter().find(|record| record.name == HVM_CONTEXT).unwrap();
        assert_eq!(of_xen(&record.data[8..]), Some(vec![0x06dd_8000]));
    }

    #[test]
    fn xens_context_tells() {
        let (header, end) = (part(1, &[9; 24]), part(0, &[]));
        let context = [header.clone(), vcpu(0x8000_0011, 0x5000), vcpu(0x11, 0x7000), end.clone()].concat();
        assert_eq!(of_xen(&context), Some(vec![0x5000]), "the second vCPU was not started");
        assert_eq!(of_xen(&[header, end].concat()), None);
        assert_eq!(of_xen(&context[..context.len() - 500]), None, "cut off");
        assert_eq!(of_xen(&part(CPU, &[0; 660])), None, "too short for the register");
        assert_eq!(of_xen(&[]), None);
    }
}
