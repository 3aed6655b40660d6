/* The return path: messages out under one lock (destination), messages in (source). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "page_pump.h"

int pp_return_path_init(struct pp_return_path *rp, int fd, int cancel_fd)
{
    pthread_mutex_t *lock = malloc(sizeof(*lock));

    if (!lock)
        return -ENOMEM;
    pthread_mutex_init(lock, NULL);
    *rp = (struct pp_return_path){.fd = fd, .cancel_fd = cancel_fd, .lock = lock, .last_block = -1};
    return 0;
}

void pp_return_path_free(struct pp_return_path *rp)
{
    if (rp->lock)
        pthread_mutex_destroy(rp->lock);
    free(rp->lock);
    rp->lock = NULL;
}

/* The lock is held: a message is never cut in two by another thread's. */
static int send_locked(struct pp_return_path *rp, const uint8_t *bytes, uint32_t length)
{
    while (length > 0 && !rp->error) {
        ssize_t n = write(rp->fd, bytes, length);

        if (n >= 0) {
            bytes += n;
            length -= (uint32_t)n;
        } else if (errno == EAGAIN) {
            rp->error = pp_wait(rp->fd, 1, rp->cancel_fd, -1);
        } else if (errno != EINTR) {
            rp->error = -errno;
        }
    }
    return rp->error;
}

int pp_return_path_send_raw(struct pp_return_path *rp, const uint8_t *bytes, uint32_t length)
{
    int error;

    pthread_mutex_lock(rp->lock);
    error = send_locked(rp, bytes, length);
    pthread_mutex_unlock(rp->lock);
    return error;
}

int pp_return_path_send(struct pp_return_path *rp, uint16_t type, const uint8_t *payload, uint32_t length)
{
    uint8_t message[4 + RP_PAYLOAD_LIMIT];

    if (length > RP_PAYLOAD_LIMIT)
        return -EMSGSIZE;
    pp_put16(message, type);
    pp_put16(message + 2, (uint16_t)length);
    memcpy(message + 4, payload, length);
    return pp_return_path_send_raw(rp, message, 4 + length);
}

int pp_return_path_request(struct pp_return_path *rp, const struct pp_block *blocks, int32_t block,
                           uint64_t page, uint64_t count)
{
    size_t name = strlen(blocks[block].name);
    uint8_t message[4 + 13 + PP_NAME];
    uint32_t length = 4 + 12;
    int error;

    pp_put64(message + 4, page * PP_PAGE_SIZE);
    pp_put32(message + 12, (uint32_t)(count * PP_PAGE_SIZE));
    pthread_mutex_lock(rp->lock);
    if (rp->last_block != block) {
        message[16] = (uint8_t)name;
        memcpy(message + 17, blocks[block].name, name);
        length += 1 + (uint32_t)name;
        rp->last_block = block;
    }
    pp_put16(message, length == 16 ? RP_REQ_PAGES : RP_REQ_PAGES_ID);
    pp_put16(message + 2, (uint16_t)(length - 4));
    error = send_locked(rp, message, length);
    pthread_mutex_unlock(rp->lock);
    return error;
}

static int32_t block_by_name(struct pp_source *s, const uint8_t *name, uint32_t length)
{
    for (uint32_t i = 0; i < s->block_count; i++) {
        if (strlen(s->blocks[i].name) == length && !memcmp(s->blocks[i].name, name, length))
            return (int32_t)i;
    }
    return -1;
}

/* A request is the peer's word: every number in it is checked before it reaches the queue. */
static int take_request(struct pp_source *s, struct pp_reader *r, uint16_t type, const uint8_t *payload,
                        uint32_t length, int32_t *last_block)
{
    uint64_t start, bytes, at = r->offset;

    if (type == RP_REQ_PAGES ? length != 12 : length < 13 || length != 13u + payload[12])
        return pp_bad(&s->fault, PP_BAD_LENGTH, length, at);
    if (type == RP_REQ_PAGES_ID) {
        *last_block = block_by_name(s, payload + 13, payload[12]);
        if (*last_block < 0) {
            memcpy(s->fault.name, payload + 13, payload[12]);
            s->fault.name[payload[12]] = 0;
            return pp_bad(&s->fault, PP_BAD_BLOCK, 0, at);
        }
    }
    if (*last_block < 0)
        return pp_bad(&s->fault, PP_BAD_NO_BLOCK, 0, at);
    start = pp_be64(payload);
    bytes = pp_be32(payload + 8);
    if (start % PP_PAGE_SIZE || start / PP_PAGE_SIZE >= s->blocks[*last_block].pages)
        return pp_bad(&s->fault, PP_BAD_OFFSET, start, at);
    if (bytes % PP_PAGE_SIZE || !bytes ||
        bytes / PP_PAGE_SIZE > s->blocks[*last_block].pages - start / PP_PAGE_SIZE)
        return pp_bad(&s->fault, PP_BAD_LENGTH, bytes, at);
    return pp_source_request(s, (uint32_t)*last_block, start / PP_PAGE_SIZE, bytes / PP_PAGE_SIZE);
}

int pp_source_read_message(struct pp_source *s, struct pp_reader *r, uint8_t *payload, uint32_t *length,
                           int32_t *last_block)
{
    for (;;) {
        uint8_t header[4];
        uint16_t type;
        int error = pp_reader_take(r, header, 4);

        if (error)
            return error;
        type = pp_be16(header);
        *length = pp_be16(header + 2);
        if (*length > RP_PAYLOAD_LIMIT)
            return pp_bad(&s->fault, PP_BAD_LENGTH, *length, r->offset - 2);
        error = pp_reader_take(r, payload, *length);
        if (error)
            return error;
        if (type != RP_REQ_PAGES && type != RP_REQ_PAGES_ID)
            return type;
        error = take_request(s, r, type, payload, *length, last_block);
        if (error)
            return error;
    }
}
