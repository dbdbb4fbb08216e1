use prost::Message;

use super::*;

/// As long as no bytes are at fault.
fn count<T: Message>(shape: &'static Shape, message: &T) -> usize {
    element_bytes(shape, &message.encode_to_vec(), usize::MAX).expect("encoded by prost")
}

#[test]
fn an_element_of_two_bytes_counts_as_its_struct() {
    let wire = [0x32, 0].repeat(1_000);
    let each = size_of::<v1::Media>();
    let counted = element_bytes(&shapes::GenerateRequest, &wire, usize::MAX);
    assert_eq!(counted, Ok(1_000 * each));
    assert!(each > 64, "{each} bytes");
    let most_bytes = 1_000 * each - 1;
    assert_eq!(
        element_bytes(&shapes::GenerateRequest, &wire, most_bytes),
        Err(Fault::TooLarge { field: "media" })
    );
    let counted = element_bytes(&shapes::GenerateRequest, &wire, most_bytes + 1);
    assert_eq!(counted, Ok(1_000 * each), "all that it may take");
}

#[test]
fn numbers_count_the_same_packed_and_one_by_one() {
    let many = v1::DetokenizeRequest {
        token_ids: vec![127; 300], // a length of two bytes
        skip_special_tokens: None,
    };
    assert_eq!(count(&shapes::DetokenizeRequest, &many), 300 * 4);
    let ids = vec![0, 127, 128, u32::MAX];
    let packed = v1::DetokenizeRequest {
        token_ids: ids.clone(),
        skip_special_tokens: None,
    };
    assert_eq!(count(&shapes::DetokenizeRequest, &packed), 16);
    let mut wire = Vec::new();
    for id in ids {
        wire.push(0x08);
        prost::encoding::encode_varint(id.into(), &mut wire);
    }
    let counted = element_bytes(&shapes::DetokenizeRequest, &wire, usize::MAX);
    assert_eq!(counted, Ok(16));

    let adjustments = v1::LogitAdjustments {
        bias_token_ids: vec![1; 3],
        biases: vec![0.5; 3],
        ..Default::default()
    };
    assert_eq!(count(&shapes::LogitAdjustments, &adjustments), 24);
    let by_one = [[0x2d, 0, 0, 0, 0]; 3].concat();
    let counted = element_bytes(&shapes::LogitAdjustments, &by_one, usize::MAX);
    assert_eq!(counted, Ok(12));
}

#[test]
fn lists_of_nested_messages_are_found() {
    let request = v1::GenerateRequest {
        sampling: Some(v1::SamplingParams {
            logit_bias: [(3, 0.5), (4, 0.5)].into(),
            ..Default::default()
        }),
        stopping: Some(v1::StoppingCriteria {
            stop: vec![String::new(), "x".to_owned(), "y".to_owned()],
            ..Default::default()
        }),
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIds {
            ids: vec![1; 5],
        })),
        ..Default::default()
    };
    let texts = 3 * size_of::<String>() + 2 * TEXT_BLOCK_BYTES;
    let all = 2 * 16 + texts + 5 * 4;
    assert_eq!(count(&shapes::GenerateRequest, &request), all);
    let named = v1::GenerateRequest {
        model: "a text that is no element has its String in the message".to_owned(),
        ..request
    };
    let named = count(&shapes::GenerateRequest, &named);
    assert_eq!(named, all + TEXT_BLOCK_BYTES);
}

#[test]
fn what_is_no_message_is_refused_wherever_it_ends() {
    let malformed: [&[u8]; 9] = [
        &[0x32],                                                    // no length
        &[0x32, 1],                                                 // no content
        &[0x80],                                                    // half a key
        &[0x00, 0],                                                 // field 0
        &[0x37, 0],                                                 // wire type 7
        &[0x09, 0, 0, 0],                                           // half a number
        &[0x22, 2, 0x0a, 1],                                        // beyond its message
        &[0x22, 3, 0x0a, 1, 0x80],                                  // half an id
        &[0x50, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0x02], // 65 bits
    ];
    for wire in malformed {
        let counted = element_bytes(&shapes::GenerateRequest, wire, usize::MAX);
        assert_eq!(counted, Err(Fault::Malformed), "{wire:?}");
        assert!(v1::GenerateRequest::decode(wire).is_err(), "{wire:?}");
    }
    let group = element_bytes(&shapes::GenerateRequest, &[0x7b, 0x7c], usize::MAX);
    assert_eq!(group, Err(Fault::Group));
}

#[test]
fn a_negative_number_takes_ten_bytes_and_is_valid() {
    let request = v1::GenerateRequest {
        sampling: Some(v1::SamplingParams {
            seed: Some(-1),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(count(&shapes::GenerateRequest, &request), 0);
}

#[test]
fn fields_of_later_versions_are_passed_over() {
    let wire = [
        0xfa, 0x01, 3, 1, 2, 3, 0xf8, 0x01, 5, 0xfd, 0x01, 0, 0, 0, 0, 0xf9, 0x01, 0, 0, 0, 0, 0,
        0, 0, 0,
    ];
    assert_eq!(element_bytes(&shapes::GenerateRequest, &wire, 0), Ok(0));
    assert!(v1::GenerateRequest::decode(&wire[..]).is_ok());
}
